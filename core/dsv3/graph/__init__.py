"""The model: configuration, weight names, YaRN, attention, experts, MTP. It calls operators and knows no hardware."""
