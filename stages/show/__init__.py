"""Turns documents into text and HTML; computes nothing."""
