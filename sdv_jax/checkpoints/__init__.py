"""Checkpoints: conversion rules, the engine that applies them, safetensors and orbax folders."""
