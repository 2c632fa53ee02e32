"""The network: parameters and wiring. Read hope.py first."""
