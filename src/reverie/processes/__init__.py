"""What training and sampling must agree on."""
