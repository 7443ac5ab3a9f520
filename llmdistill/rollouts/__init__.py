"""Engines that sample from the student, behind one interface."""
