"""The training methods: one module a family. Imports no torch."""
