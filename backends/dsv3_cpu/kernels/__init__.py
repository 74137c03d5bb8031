"""What numba compiles: functions of arrays, without torch."""
