"""What every front door does with a recipe: check, measure, train, measure again, save, show."""
