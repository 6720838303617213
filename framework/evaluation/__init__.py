"""F4: tasks run against a generator (`runner`), and what a model must beat (`baselines`). Nothing is imported here."""
