"""What several reports draw and say of arms alike."""
