"""A child's weights from its parent's."""
