"""Attacks on a training that is said to be private, and what they show: lower bounds on epsilon, members, copies."""
