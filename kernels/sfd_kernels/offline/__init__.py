"""The developer's tools, none imported at run time: example inputs, offline compilation, counted bytes, the report."""
