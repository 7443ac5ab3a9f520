"""What a step is made of: texts, views, judges, terms, and the method that puts them together."""
