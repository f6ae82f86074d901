"""Measurements: interleaved with the alternative, with fsyncs per op beside every time."""
