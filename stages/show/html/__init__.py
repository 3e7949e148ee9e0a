"""The HTML report: a document, as `--json` prints it, as one self-contained page. Needs the extra `svf[report]`."""
