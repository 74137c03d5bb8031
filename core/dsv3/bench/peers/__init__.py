"""The same token ids through dsv3 and other engines, each in a process of its own, one after the other."""
