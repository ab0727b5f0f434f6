"""Truth for tests and benchmarks: what a product should be, how far from it a kernel may be, and which cases to try.

Owns the float64 oracle, the elementwise tolerance, the table of cases and the emulator of the instructions that read
packed bytes. Knows the canonical weight and nothing of layouts, ops or the runtime, so that it shares no code with
what it checks.
"""
