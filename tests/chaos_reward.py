"""A reward that even a policy of random weights has a signal from."""


def different_characters(completion: str, answer: str, question: str) -> float:
    """How many different characters a completion has."""
    return float(len(set(completion)))
