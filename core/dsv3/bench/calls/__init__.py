"""The operators' calls at the sizes of DeepSeek-V3 671B on one rank: what is measured on a device, and compiled without one."""
