"""anyfp4 inside other libraries: one module for each."""
