"""What runs have left in their work dirs, read and shown: tables, figures, one page. It knows neither DeepSpeed nor mmdet."""
