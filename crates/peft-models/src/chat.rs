//! Chat templates: the Jinja program that turns messages into the one string that a chat model was trained on.
//!
//! The environment is the one in which Hugging Face `transformers` renders them: `trim_blocks`, `lstrip_blocks`, loop
//! controls, Python's string methods, `raise_exception`, `strftime_now` and a `tojson` that writes as Python's
//! `json.dumps` does.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of that role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// Instructions that hold for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model says.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Whether the model says it, so that training learns it.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
}

/// `ChatML` without a default system prompt, for models that bring no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The only template of an environment; appears in messages as `(in chat_template:LINE)`.
const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// When it is not valid Jinja.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        let source = source.into();
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match value.kind() {
            ValueKind::None => Ok(out.write_str("None")?),
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.add_filter("tojson", |value: Value, options: Kwargs| to_json(&value, &options));
        environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            strftime(&format, now)
        });
        environment.add_template_owned(NAME, without_generation_tags(&source)).map_err(|e| template_error(&e))?;
        Ok(Self { source, environment })
    }

    /// The `ChatML` template: `<|im_start|>role\ncontent<|im_end|>\n` per message.
    ///
    /// # Errors
    /// Never in practice; the source is compiled like any other.
    pub fn chatml() -> Result<Self> {
        Self::new(CHATML)
    }

    /// The Jinja program as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as one string. With `add_generation_prompt` it ends where the assistant's next answer begins.
    ///
    /// # Errors
    /// When the template refuses the messages, for instance two user turns in a row.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<String> {
        // Absent special tokens are undefined, which prints as nothing; absent tools are none, as templates test for.
        let token = |token: Option<&str>| token.map_or(Value::UNDEFINED, Value::from);
        let template = self.environment.get_template(NAME).map_err(|e| template_error(&e))?;
        template
            .render(context! {
                messages, add_generation_prompt, bos_token => token(bos), eos_token => token(eos), tools => (), documents => (),
            })
            .map_err(|e| template_error(&e))
    }
}

/// The error with its causes, on one line.
fn template_error(error: &minijinja::Error) -> Error {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        // Writing to a string cannot fail.
        let _ = write!(message, ": {error}");
        cause = error.source();
    }
    Error::Template(message)
}

/// Replaces `{% generation %}` … `{% endgeneration %}`, a tag of `transformers` that marks the assistant's text and that
/// Jinja does not know, by a block that changes nothing and keeps the same whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}") else { break };
        let tag = &rest[open + 2..open + close];
        out.push_str(&rest[..open + 2]);
        match tag.trim_matches(['-', '+']).trim() {
            name @ "generation" => out.push_str(&tag.replace(name, "if true")),
            name @ "endgeneration" => out.push_str(&tag.replace(name, "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[open + close..];
    }
    out + rest
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: unlike Jinja's own filter it escapes no HTML.
fn to_json(value: &Value, options: &Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let refused = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonJson)),
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        }
    }
    .map_err(refused)?;
    Ok(Value::from(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Python's separators: `, ` between items, `: ` after keys.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// The directives of C's `strftime` that templates use, in UTC: `%Y %y %m %d %e %j %H %M %S %b %B %a %A %%`.
fn strftime(format: &str, unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // The Gregorian calendar counted from 1 March of year 0, where the leap day is the last day of the year; a month's
    // first day in it is (153 m + 2) / 5.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month < 2);
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let ordinal = if month < 2 { day_of_year - 305 } else { day_of_year + 60 + u64::from(leap) };
    let (month_name, weekday) = (MONTHS[month as usize], WEEKDAYS[(days % 7) as usize]);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let piece = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{:02}", month + 1),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{ordinal:03}"),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        out.push_str(&piece);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    // Shapes of published templates. The expected strings below are what `transformers` 5.23 renders from the same
    // sources and messages, with `<s>` and `</s>` as special tokens.
    const SMOLLM2: &str = r#"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"#;
    const LLAMA3: &str = r#"{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;
    const MISTRAL: &str = r#"{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"#;
    const QWEN25: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n# Tools' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;
    const CORNERS: &str = r#"{%- set ns = namespace(n=0, last=none) %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- set ns.last = m.content.split(' ')[-1].strip().upper() %}
    {%- if ns.n == 2 %}{% break %}{% endif %}
{%- endfor %}
{% if ns.n > 1 %}
    {{ ns.n }}|{{ ns.last }}|{{ none }}|{{ true }}|{{ undefined_name }}|{{ messages[0] | tojson }}|{{ ['<a>', {'b': [1, none, true]}] | tojson }}
    {{ {'k': 'é'} | tojson(indent=2) }}
{% endif %}
{% for m in messages %}{%- if m.role == 'assistant' -%}{%- generation -%}  A:{{ m['content'].rstrip() }}{% endgeneration %}{% endif %}{% endfor %}
{{ messages | length }} {{ messages[0].get('name', 'nobody') }} {{ 'user' in messages | map(attribute='role') | list }}"#;

    fn plain() -> Vec<Message> {
        vec![Message::user("Hi <b> "), Message::assistant("Hello!"), Message::user("Bye")]
    }

    fn with_system() -> Vec<Message> {
        vec![Message::system(" Be brief. "), Message::user("Hi"), Message::assistant(" Yo ")]
    }

    fn check(template: &str, messages: &[Message], add_generation_prompt: bool, expected: &str) {
        let template = ChatTemplate::new(template).unwrap();
        assert_eq!(template.render(messages, add_generation_prompt, Some("<s>"), Some("</s>")).unwrap(), expected);
    }

    #[test]
    fn chatml_templates_render_as_transformers_does() {
        check(
            SMOLLM2,
            &plain(),
            true,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nHi <b> <|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        );
        check(
            SMOLLM2,
            &with_system(),
            false,
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Yo <|im_end|>\n",
        );
        check(
            QWEN25,
            &plain(),
            true,
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi <b> <|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        );
        check(
            QWEN25,
            &with_system(),
            false,
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Yo <|im_end|>\n",
        );
    }

    #[test]
    fn llama_3_template_renders_as_transformers_does() {
        check(
            LLAMA3,
            &plain(),
            true,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi <b><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        );
        check(
            LLAMA3,
            &with_system(),
            false,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
        );
    }

    #[test]
    fn corners_of_jinja_render_as_transformers_does() {
        check(
            CORNERS,
            &plain(),
            true,
            "    2|HELLO!|None|True||{\"role\": \"user\", \"content\": \"Hi <b> \"}|[\"<a>\", {\"b\": [1, null, true]}]\n    {\n  \"k\": \"é\"\n}\nA:Hello!3 nobody True",
        );
        check(
            CORNERS,
            &with_system(),
            false,
            "    2|HI|None|True||{\"role\": \"system\", \"content\": \" Be brief. \"}|[\"<a>\", {\"b\": [1, null, true]}]\n    {\n  \"k\": \"é\"\n}\nA: Yo3 nobody True",
        );
    }

    #[test]
    fn mistral_template_renders_and_refuses_as_transformers_does() {
        check(MISTRAL, &plain(), true, "<s>[INST] Hi <b>  [/INST]Hello!</s> [INST] Bye [/INST]");
        let template = ChatTemplate::new(MISTRAL).unwrap();
        let error = template.render(&with_system(), false, Some("<s>"), Some("</s>")).unwrap_err().to_string();
        assert!(error.contains("Conversation roles must alternate") && error.contains("chat_template:1"), "{error}");
    }

    #[test]
    fn default_template_is_chatml() {
        let text = ChatTemplate::chatml().unwrap().render(&with_system(), true, None, None).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Yo \
             <|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_template_that_is_not_jinja_is_refused_with_its_line() {
        let error = ChatTemplate::new("a\n{% for x in %}").unwrap_err().to_string();
        assert!(error.contains("chat_template:2"), "{error}");
    }

    #[test]
    fn strftime_agrees_with_python() {
        // datetime.fromtimestamp(t, timezone.utc).strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%")
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 0),
            "1970-01-01 001 Thu 01 Jan 70 00:00:00 Thursday January %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 951_782_399),
            "2000-02-28 059 Mon 28 Feb 00 23:59:59 Monday February %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 951_782_400),
            "2000-02-29 060 Tue 29 Feb 00 00:00:00 Tuesday February %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 951_868_799),
            "2000-02-29 060 Tue 29 Feb 00 23:59:59 Tuesday February %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 1_709_164_800),
            "2024-02-29 060 Thu 29 Feb 24 00:00:00 Thursday February %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 1_735_689_599),
            "2024-12-31 366 Tue 31 Dec 24 23:59:59 Tuesday December %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 4_107_542_399),
            "2100-02-28 059 Sun 28 Feb 00 23:59:59 Sunday February %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %d %b %y %H:%M:%S %A %B %%", 4_107_542_400),
            "2100-03-01 060 Mon 01 Mar 00 00:00:00 Monday March %"
        );
    }
}
