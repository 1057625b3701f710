//! Tokenising rows, and deciding which tokens are learnt.
//!
//! Each row is rendered to one string and tokenised once, as at inference. The tokens to learn are found by the bytes
//! they cover, so that any tokenizer and any chat template work: the answer of turn `i` is what rendering `messages[..=i]`
//! adds to rendering `messages[..i]` with the generation prompt.

use std::fmt;
use std::ops::{AddAssign, Range};

use peft_models::chat::Message;
use peft_models::tokenizer::Tokenizer;

use super::rows::Row;
use crate::{Error, Result};

/// How rows become samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Most tokens of a sample. A longer text is split into several samples, any other row is cut at its end.
    pub max_len: usize,
    /// End each row with an end token, unless it has one already.
    pub add_eos: bool,
    /// Learn the prompts too, not only the answers.
    pub train_on_prompt: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { max_len: 1024, add_eos: true, train_on_prompt: false }
    }
}

/// A token sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    ids: Vec<u32>,
    mask: Vec<bool>,
    task: usize,
}

impl Sample {
    /// A sequence with, for each token, whether it is learnt. The first never is: nothing predicts it.
    ///
    /// # Errors
    /// When the lengths differ or no token is learnt.
    pub fn new(ids: Vec<u32>, mut mask: Vec<bool>) -> Result<Self> {
        if ids.len() != mask.len() {
            return Err(Error::setting("mask", format!("{} entries for {} tokens", mask.len(), ids.len())));
        }
        if let Some(first) = mask.first_mut() {
            *first = false;
        }
        if !mask.contains(&true) {
            return Err(Error::setting("mask", "no token after the first is learnt; leave such a sample out"));
        }
        Ok(Self { ids, mask, task: 0 })
    }

    /// The same as one of that task.
    #[must_use]
    pub fn of_task(self, task: usize) -> Self {
        Self { task, ..self }
    }

    /// The task that it is of, from 0.
    pub fn task(&self) -> usize {
        self.task
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Which tokens are learnt; the first never is.
    pub fn mask(&self) -> &[bool] {
        &self.mask
    }

    /// How many tokens are learnt.
    pub fn trained(&self) -> usize {
        self.mask.iter().filter(|&&learnt| learnt).count()
    }
}

/// What [`encode`] did, above all what it left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodeReport {
    /// Rows given.
    pub rows: usize,
    /// Samples made.
    pub samples: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Tokens that are learnt.
    pub trained: usize,
    /// Texts longer than `max_len`, each split into several samples. Every token but the first is learnt exactly once.
    pub rows_split: usize,
    /// Rows cut at `max_len`.
    pub rows_truncated: usize,
    /// Tokens that these lost.
    pub tokens_dropped: usize,
    /// Rows without any token to learn, often because the prompt alone fills `max_len`.
    pub rows_skipped: usize,
    /// Answers whose first token also covers the prompt's end, so that the model will meet other tokens at inference.
    pub answers_merged: usize,
}

impl AddAssign for EncodeReport {
    fn add_assign(&mut self, other: Self) {
        let Self { rows, samples, tokens, trained, rows_split, .. } = other;
        self.rows += rows;
        self.samples += samples;
        self.tokens += tokens;
        self.trained += trained;
        self.rows_split += rows_split;
        self.rows_truncated += other.rows_truncated;
        self.tokens_dropped += other.tokens_dropped;
        self.rows_skipped += other.rows_skipped;
        self.answers_merged += other.answers_merged;
    }
}

impl fmt::Display for EncodeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, samples, tokens, trained, .. } = self;
        write!(f, "{rows} rows: {samples} samples, {tokens} tokens, {trained} of them learnt")?;
        let mut note = |count: usize, what: &str| if count > 0 { write!(f, "; {count} {what}") } else { Ok(()) };
        note(self.rows_split, "texts split at max_len")?;
        note(self.rows_truncated, "rows cut at max_len")?;
        note(self.tokens_dropped, "tokens lost by that")?;
        note(self.rows_skipped, "rows skipped, nothing to learn")?;
        note(self.answers_merged, "answers start inside a token of the prompt")
    }
}

/// Tokenises rows. Samples keep the order of the rows.
///
/// # Errors
/// When `max_len` is below 2, `add_eos` is set and the tokenizer has no end token, or the chat template refuses a row.
pub fn encode(rows: &[Row], tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<(Vec<Sample>, EncodeReport)> {
    let EncodeOptions { max_len, add_eos, train_on_prompt } = *options;
    if max_len < 2 {
        return Err(Error::setting("max_len", format!("is {max_len}; a sample needs at least 2 tokens")));
    }
    let eos = &tokenizer.special().eos;
    if add_eos && eos.is_empty() {
        let what =
            "the tokenizer declares no end token; declare eos_token in tokenizer_config.json or turn add_eos off";
        return Err(Error::setting("add_eos", what));
    }
    let mut report = EncodeReport { rows: rows.len(), ..EncodeReport::default() };
    let mut samples = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        let refused = |what: String| Error::Row { row: index + 1, what };
        let mut rendered = render(row, tokenizer).map_err(refused)?;
        if train_on_prompt {
            rendered.answers = std::iter::once(0..rendered.text.len()).collect();
        }
        let (mut ids, ranges) = tokenizer.encode_with_offsets(&rendered.text, rendered.add_special)?;
        // A token belongs to the answer in which it ends: one across the answer's start must be learnt, one across its
        // end must not. Some tokenizers leave surrounding blanks out of a token's range, which moves no end across.
        let learnt = |token: &Range<usize>| rendered.answers.iter().any(|a| a.start < token.end && token.end <= a.end);
        let mut mask: Vec<bool> = ranges.iter().map(learnt).collect();
        let merged =
            |answer: &&Range<usize>| ranges.iter().any(|token| token.start < answer.start && answer.start < token.end);
        report.answers_merged += rendered.answers.iter().filter(merged).count();

        // Nothing after the last answer can influence it.
        let kept = mask.iter().rposition(|&learnt| learnt).map_or(0, |last| last + 1);
        ids.truncate(kept);
        mask.truncate(kept);
        let blank = |&i: &usize| rendered.text[ranges[i].clone()].trim().is_empty() && !eos.contains(&ids[i]);
        let ended = (0..kept).rev().find(|i| !blank(i)).is_some_and(|last| eos.contains(&ids[last]));
        if add_eos && !ended && kept > 0 {
            ids.push(eos[0]);
            mask.push(true);
        }

        let (stride, pieces) = match row {
            // Neighbours share one token, so that each is learnt exactly once.
            Row::Text { .. } => (max_len - 1, ids.len().saturating_sub(1).div_ceil(max_len - 1)),
            _ => (max_len, 1),
        };
        report.rows_split += usize::from(pieces > 1);
        if pieces == 1 && ids.len() > max_len {
            report.rows_truncated += 1;
            report.tokens_dropped += ids.len() - max_len;
        }
        let before = samples.len();
        for start in (0..pieces).map(|piece| piece * stride) {
            let range = start..ids.len().min(start + max_len);
            // Refused only when nothing is learnt.
            samples.extend(Sample::new(ids[range.clone()].to_vec(), mask[range].to_vec()));
        }
        report.rows_skipped += usize::from(samples.len() == before);
    }
    report.samples = samples.len();
    report.tokens = samples.iter().map(|sample| sample.ids.len()).sum();
    report.trained = samples.iter().map(Sample::trained).sum();
    Ok((samples, report))
}

/// A row as the model will see it.
struct Rendered {
    text: String,
    /// Byte ranges of what is learnt.
    answers: Vec<Range<usize>>,
    /// Whether the tokenizer adds its special tokens; a chat template has them in its text.
    add_special: bool,
}

/// An error says what is wrong with the row; the caller knows which it is.
type Rendering = std::result::Result<Rendered, String>;

fn render(row: &Row, tokenizer: &Tokenizer) -> Rendering {
    let continued = |prompt: &str, answer: &str| Rendered {
        text: format!("{prompt}{answer}"),
        answers: std::iter::once(prompt.len()..prompt.len() + answer.len()).collect(),
        add_special: true,
    };
    match row {
        Row::Text { text } => Ok(continued("", text)),
        Row::Completion { prompt, completion } => Ok(continued(prompt, completion)),
        Row::Instruction { instruction, input, output } if tokenizer.chat_template().is_some() => {
            let question = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
            render_chat(&[Message::user(question), Message::assistant(output)], tokenizer)
        }
        Row::Instruction { instruction, input, output } => Ok(continued(&alpaca_prompt(instruction, input), output)),
        Row::Chat { messages } => render_chat(messages, tokenizer),
    }
}

/// The prompt of the Alpaca data set, whose exact wording the models trained on such data expect.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

fn render_chat(messages: &[Message], tokenizer: &Tokenizer) -> Rendering {
    let text = tokenizer.render_chat(messages, false).map_err(|e| e.to_string())?;
    let mut answers: Vec<Range<usize>> = Vec::new();
    for (turn, message) in messages.iter().enumerate().filter(|(_, message)| message.is_assistant()) {
        let from = answers.last().map_or(0, |answer| answer.end);
        let answer = answer_by_prefix(&text, messages, turn, tokenizer)
            .filter(|answer| answer.start >= from)
            .or_else(|| answer_by_content(&text, from, &message.content, tokenizer))
            .ok_or_else(|| {
                format!(
                    "the chat template rewrites what the assistant says in turn {}, so it cannot be found; give that \
                     answer a row of its own, as the last turn",
                    turn + 1
                )
            })?;
        answers.push(answer);
    }
    Ok(Rendered { text, answers, add_special: false })
}

/// The answer of a turn, end-of-turn token included: what its rendering adds to the rendering of the turns before it with
/// the generation prompt. None when the template renders a turn otherwise once others follow.
fn answer_by_prefix(text: &str, messages: &[Message], turn: usize, tokenizer: &Tokenizer) -> Option<Range<usize>> {
    // A template may refuse part of a conversation that it accepts as a whole.
    let prompt = tokenizer.render_chat(&messages[..turn], true).ok()?;
    let through = tokenizer.render_chat(&messages[..=turn], false).ok()?;
    let start = Some(prompt.len()).filter(|_| text.starts_with(&prompt)).or_else(|| {
        // A generation prompt may go further than the answer's own rendering, for instance by opening a reasoning block.
        let header = tokenizer.render_chat(&messages[..turn], false).ok()?;
        text.starts_with(&header).then(|| common_prefix(text, &prompt))
    })?;
    let end = common_prefix(text, &through);
    let answer = text.get(start..end)?;
    let said = messages[turn].content.trim();
    if !answer.contains(said) {
        return None;
    }
    // What separates turns is no part of them, unless nothing else ends this one.
    let trimmed = answer.trim_end();
    let ends_by_itself = said.is_empty() || !trimmed.ends_with(said);
    Some(start..if ends_by_itself { start + trimmed.len() } else { end })
}

/// The answer found by its words, with the end token that follows them.
fn answer_by_content(text: &str, from: usize, content: &str, tokenizer: &Tokenizer) -> Option<Range<usize>> {
    let said = Some(content.trim()).filter(|said| !said.is_empty())?;
    let start = from + text[from..].find(said)?;
    let end = start + said.len();
    let tokens = tokenizer.special().eos.iter().filter_map(|&id| tokenizer.token(id));
    let token = tokens.filter(|token| text[end..].starts_with(token.as_str())).map(|token| token.len()).max();
    Some(start..end + token.unwrap_or(0))
}

/// Bytes that two texts have in common at their start, cut to whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.floor_char_boundary(a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count())
}

#[cfg(test)]
mod tests;
