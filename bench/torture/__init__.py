"""The twelve promises tried in full: `make torture`, which writes docs/trust.md."""
