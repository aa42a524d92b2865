"""Editors that CREME is compared with: ROME, MEMIT, GRACE, fine-tuning, LoRA, KnowledgeEditor."""
