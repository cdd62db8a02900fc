"""What may follow a training: the fold, the exports, a model card, an upload to the Hub.

Takes a run's folder; gives folders beside its adapters and, where asked, a repository on the Hub. Neither DeepSpeed nor
transformers is imported here, and huggingface_hub only where a card is written or something is uploaded.

    after_training   what could not be done, checked before a run starts; the order; what is said where a part fails
    facts            a run's folder, read
    card             the card of one folder: its YAML header and its text
    card_text        what its sections say; card.md.j2 is the text around it
    markdown         templates in which what is put in is text
    push             which files go to the Hub, and their upload
"""
