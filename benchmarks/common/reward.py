"""A reward that every policy gets some signal from."""


def distinct_characters(completion: str, answer: str, question: str = "") -> float:
    """How many different characters a completion has."""
    return float(len(set(completion)))
