"""What a stage may have been computed by: one catalogue of recipes, right and wrong, and the search among them."""
