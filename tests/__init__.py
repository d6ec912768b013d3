"""The tests of halo, one folder a room. `python3 tests/run.py` runs them all."""
