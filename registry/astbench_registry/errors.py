"""What can go wrong on this floor; every message is one line that says what to change."""


class RegistryError(ValueError):
    """A name or a plugin is at fault."""


class UnknownAttentionError(RegistryError):
    """No attention of that name."""


class UnknownTransformError(RegistryError):
    """No transform of that name."""


class UnknownDepthError(RegistryError):
    """No depth policy of that name."""


class PluginError(RegistryError):
    """A plugin does not load, or clashes with another."""


class CapabilityError(ValueError):
    """A variant is asked for something that its capability record excludes."""
