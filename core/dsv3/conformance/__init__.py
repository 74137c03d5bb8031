"""The conformance suite: aimed at any backend, it proves or refutes that its kernels are right."""
