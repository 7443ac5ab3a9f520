"""What confines programs here, in words: what is in force, and what that leaves open."""

from __future__ import annotations

from typing import Any


def in_words(means: dict[str, Any]) -> str:
    """A line for people and results, from Sandbox.means."""
    if means["mode"] == "none":
        return "programs run UNCONFINED (time and memory limits only)"
    parts = [f"namespaces ({', '.join(means['namespaces'])})"] if means["namespaces"] else []
    if means["landlock_abi"]:
        parts.append(f"Landlock ABI {means['landlock_abi']}")
    parts.append("a system-call filter (seccomp)")
    parts.append(f"limits ({', '.join(means['rlimits'])})")
    if means["control_group"]:
        parts.append("a control group (memory, tasks)")
    if means["switches_to_uid"] is not None:
        parts.append("a uid of their own")
    parts.append("no capabilities but one to read" if means["keeps_capability"] else "no capabilities")
    parts.append("a folder in memory" if means["private_folder"] else "no writable folder")
    text = f"programs run with {', '.join(parts)}"
    open_ends = remains(means)
    return f"{text}; what remains: {'; '.join(open_ends)}" if open_ends else text


def remains(means: dict[str, Any]) -> list[str]:
    """What a program can still do or see that a stronger machine would keep from it."""
    if means["mode"] == "none":
        return ["everything that this user may do"]
    found = []
    if not means["namespaces"]:
        found.append("they see whether files exist, their sizes, owners and times (not names in folders, not contents)")
    if means["namespaces"] and not means["landlock_abi"]:
        found.append("the root directory alone keeps files from them (no Landlock)")
    if means["root"]:
        found.append("they stay uid 0, without capabilities: no other uid is to be had here that can read Python")
    if means["keeps_capability"]:
        found.append("Landlock alone keeps unreadable files from them: this Python can be read by root only")
    if "nproc" not in means["rlimits"] and not means["control_group"]:
        found.append("the number of their threads is not limited")
    if not means["control_group"]:
        found.append("memory is limited process by process, not in sum (no control group delegated)")
    if not means["dies_first"]:
        found.append("when memory runs out the kernel may end another process first")
    return found
