"""The linear loss in trainers of other libraries. Each module needs its library; nothing here is imported elsewhere."""
