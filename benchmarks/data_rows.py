"""One measurement of benchmarks/data.py as a row: median with quartiles, and whether it keeps its bar."""


def row(name: str, values: list[float] | float, unit: str, *, bar: float | None = None, at_most: bool = False) -> dict:
    """values: of all rounds, or one. holds: None without a bar."""
    values = sorted(values if isinstance(values, list) else [values])
    low, value, high = (values[round(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75))
    holds = None if bar is None else bool(value <= bar if at_most else value >= bar)
    return {"name": name, "value": value, "low": low, "high": high, "unit": unit, "bar": bar, "at_most": at_most,
            "holds": holds}  # fmt: skip
