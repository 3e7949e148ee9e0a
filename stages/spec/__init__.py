"""What is computed: stages, families, layouts, configs, the backend protocol; no bytes, no numerics."""
