module culvert.dev/e2e/services

go 1.26.0
