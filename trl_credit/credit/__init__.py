"""Credit functions: pure tensor functions, `(B, T)` in and `(B, T)` out, float32 inside."""
