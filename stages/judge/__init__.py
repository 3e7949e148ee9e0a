"""Turns recorded runs into documents: what differs, which side is wrong, and why."""
