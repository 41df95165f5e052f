import { post } from "./api.js";

const [form, token, said] = ["form", "token", "said"].map((id) => document.getElementById(id));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await post("/login", { token: token.value.trim() });
    location.href = "/";
  } catch (error) {
    said.textContent = error.message;
  }
});
