"""How the two ends of a link share `--max_packets_in_flight` among them: one packet more than that is on its way."""

from __future__ import annotations


def packets_pending(max_in_flight: int) -> int:
    """Packets that a sender holds at a time: one on its way, and one behind it."""
    return min(2, max_in_flight)


def packets_asked_for(max_in_flight: int) -> int:
    """Packets that a receiver has asked for, or holds until they are used."""
    return max_in_flight + 1 - packets_pending(max_in_flight)
