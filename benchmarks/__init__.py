"""Measurements that print a table."""
