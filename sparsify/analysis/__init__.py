"""What a model is made of, what each layer costs, and what it loses when it is compressed. Values, nothing printed."""

__all__: list[str] = []
