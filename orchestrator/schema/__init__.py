"""The building blocks of config models: types of single values, and values of one of several kinds."""
