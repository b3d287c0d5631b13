"""Reward functions as a user would write them, good and bad."""

import os
import signal
import subprocess
import sys
import time

RESULT = 3


def half(completion: str, answer: str, question: str, offset: float = 0.0) -> float:
    return len(completion) / 2 + offset


def echo_context(completion: str, answer: str, question: str) -> float:
    return float(answer) * 100 + float(question)


def moody(completion: str, answer: str, question: str) -> float:
    """Does what the completion says."""
    match completion:
        case "hang":
            time.sleep(600)
        case "hang with child":
            subprocess.run(["sleep", "612.75"], check=True)
        case "raise":
            raise ValueError("no such luck")
        case "exit":
            sys.exit(3)
        case "_exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return float("nan")
        case "text":
            return "much"
    return 1.0


def heavy_modules(completion: str, answer: str, question: str) -> float:
    return float("torch" in sys.modules)


class Judge:
    """A reward function may stand in a class."""

    @staticmethod
    def score(completion: str, answer: str, question: str) -> float:
        return float(completion == answer)
