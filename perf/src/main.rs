mod answer;
mod answerer;
mod client;
mod cpu;
mod request;
fn main() {}
