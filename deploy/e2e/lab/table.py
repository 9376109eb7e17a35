"""Results as Markdown."""


class Result:
    """Outcome of a check: how long it took, or why it failed."""

    def __init__(self, seconds, fault=None, note=""):
        self.seconds, self.fault, self.note = seconds, fault, note

    def cell(self):
        """Its cell in a table."""
        if self.fault:
            return "**failed**"
        return f"{self.seconds:.2f} s" + (f", {self.note}" if self.note else "")


def markdown(results, columns, stages):
    """A table for each stage. `results` maps stage, check and column to a result."""
    lines, faults = [], []
    for stage, title in stages.items():
        rows = results.get(stage, {})
        if not rows:
            continue
        lines += [f"### {title}", "", "| check | " + " | ".join(columns.values()) + " |",
                  "| --- |" + " ---: |" * len(columns)]
        for check, by_column in rows.items():
            cells = [by_column[column].cell() if column in by_column else "–" for column in columns]
            lines.append(f"| {check} | " + " | ".join(cells) + " |")
            faults += [f"- {title}, {check}, {columns[column]}: {' '.join(result.fault.split())[:400]}"
                       for column, result in by_column.items() if result.fault]
        lines.append("")
    if faults:
        lines += ["Failures:", "", *faults, ""]
    return "\n".join(lines)
