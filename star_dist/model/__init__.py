"""The STAR transformer: single-device code that imports torch only."""
