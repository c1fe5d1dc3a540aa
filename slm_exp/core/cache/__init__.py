"""The stage cache: a content-addressed store, journals of scores, digests of files."""
