"""The trial of a plugin, level L0 of the conformance suite: does it load, say what it is, and register rightly?

Needs no device. An installed plugin is tried in processes of its own, so this package imports neither torch nor the plugin
before it must: apart from `conformance`, which is the suite of the other levels and imports torch at once.
"""
