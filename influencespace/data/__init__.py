"""Reading and writing of image-text data: no Ray, no models, no estimators."""
