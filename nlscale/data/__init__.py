"""Documents -> tokens -> packed rows -> MDS shards, once; then rows in an order that no layout changes."""
