"""F2: how a model lies over ranks: the mesh, the plans, the one order in which they apply. Knows no model class."""
